"""Who may call: tokens, certificates, and files of them that change?"""

"""How fast are other engines with the same weights?"""

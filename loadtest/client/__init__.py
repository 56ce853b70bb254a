"""How are requests sent, and what was seen of each?"""

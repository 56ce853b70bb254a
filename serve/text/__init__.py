"""How does text become token ids, and token ids text?"""

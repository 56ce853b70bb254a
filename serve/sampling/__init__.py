"""How do logits become a token?"""

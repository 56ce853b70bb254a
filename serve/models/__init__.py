"""How do weights on disk become logits over the rows of a KV cache?"""

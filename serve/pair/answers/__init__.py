"""Which answer does a completion give, and do the models agree on it?"""

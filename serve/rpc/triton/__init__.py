"""How does the Open Inference Protocol become our requests?"""

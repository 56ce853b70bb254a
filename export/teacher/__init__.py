"""Who teaches, and what does it say?"""

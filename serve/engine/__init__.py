"""How does one model serve many requests at once?"""

"""How do two models answer one request, and how far apart are they?"""

"""How is a load test shown?"""

"""How does the student learn?"""

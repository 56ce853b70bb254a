"""How fast is the engine?"""

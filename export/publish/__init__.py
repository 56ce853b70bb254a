"""What passes its gates, what is the default, and what leaves the run?"""

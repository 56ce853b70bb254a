"""Does a GPU compute the right thing, in the right place, and how fast?"""

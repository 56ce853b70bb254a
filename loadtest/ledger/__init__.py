"""Is anything lost, duplicated or altered?"""

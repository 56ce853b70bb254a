"""What does a proxy in front of the server do to its requests?"""

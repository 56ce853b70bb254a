"""What comes over HTTP?"""

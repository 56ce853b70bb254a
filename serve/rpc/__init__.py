"""What comes over gRPC, from whom, and what goes back?"""

"""What did each stage cost?"""

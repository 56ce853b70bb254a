"""How do weights become a fast and faithful ONNX graph?"""

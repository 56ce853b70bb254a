"""The contract on disk between `export` and `serve`: manifest, hashes, verification.

Imports no model library, so that a server can refuse a damaged bundle before it loads one.
"""

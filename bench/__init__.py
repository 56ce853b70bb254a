"""Tandem and its peers measured side by side; never imported by the product.

Workers import this package in environments of their own: it stays free of imports.
"""

"""A page on which the trained model runs in the browser: python -m playground"""

"""The hub as it is written to.

Order inside the wing: attempts, account, upload.
"""

"""Files: strict reading of JSON and safetensors headers, and writing that appears whole or not at all.

``atomic`` replaces a file, ``files`` a folder. ``plain`` is the one writer of safetensors. ``ledger`` checks CRCs while
bytes stream by.
"""

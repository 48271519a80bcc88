"""Files: strict reading of JSON and safetensors headers, and writing that appears whole or not at all.

``atomic`` replaces a file, ``folders`` a folder; ``files`` reads many, by names that cannot lead out of their folder.
``plain`` is the one writer of safetensors. ``ledger`` checks CRCs and digests while bytes stream by.
"""

"""The format of ``spec/format.md``: typed values, the manifest, its envelope, reading and writing."""

"""Names, axes and update rules of other libraries, as data, and their application; see ``spec/mappings.md``."""

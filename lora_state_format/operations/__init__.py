"""What the commands do: convert, check, diff, edit, export, and the reports in words and JSON."""

"""Everything that only shows: Jinja2 templates as files, and matplotlib figures."""

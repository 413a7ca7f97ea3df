"""The book's tools: export, notebooks, checks of the built pages."""

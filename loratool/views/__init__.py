"""Views of reports: documents of lines and tables for terminals, pipes and notebooks, and pages."""

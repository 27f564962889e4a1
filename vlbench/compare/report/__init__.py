"""Reports: statistics, figures and pages of finished runs."""

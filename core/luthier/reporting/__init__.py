"""Tables and pages: what a run, an artifact and a report look like."""

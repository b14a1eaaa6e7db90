"""How models differ, looked at before they are merged."""

"""Weight sync: every weight version is sent to the engines, confirmed and committed as one transaction."""

"""How the demo's models were made: run once, with torch; the demo itself needs none of this."""

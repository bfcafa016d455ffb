"""Write outputs atomically, to a local folder or a store."""

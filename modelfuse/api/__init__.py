"""What programs and notebooks call: settings in, results out, with signatures that name every setting."""

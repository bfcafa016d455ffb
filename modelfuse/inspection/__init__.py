"""An output looked at: verified, its report read, merged again and compared."""

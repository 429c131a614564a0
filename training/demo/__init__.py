"""The demo checkpoint's recipe: real recordings from Debian packages, degraded and mixed in known steps."""

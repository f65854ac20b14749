//! The verbs of the OCI distribution protocol that Shoal uses.

"""Who is who: keys, certificates, the roster, signatures of messages and approvals."""

"""Files of web servers, for lists of addresses that may come from anybody.

Every connection's address is checked, nothing is read past a limit, every request has a deadline,
and hosts are treated politely.
"""

from captioner.storage.web.access import WebAccess, set_web_access, web_access

__all__ = ["WebAccess", "set_web_access", "web_access"]

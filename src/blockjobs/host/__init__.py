"""The facade to embed: `Host`."""

from blockjobs.host.host import Host as Host

"""Which addresses are public."""

import pytest

from captioner.storage.web.addresses import private_host, private_kind


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "a loopback address"),
        ("127.255.255.254", "a loopback address"),
        ("0.0.0.0", "a loopback address"),
        ("::1", "a loopback address"),
        ("::", "a loopback address"),
        ("10.0.0.1", "a private address"),
        ("172.16.0.1", "a private address"),
        ("192.168.1.1", "a private address"),
        ("100.64.0.1", "a private address"),
        ("100.100.100.200", "a private address"),  # Alibaba's metadata
        ("192.0.0.192", "a private address"),  # Oracle's metadata
        ("198.18.0.1", "a private address"),
        ("fd00:ec2::254", "a private address"),  # Amazon's metadata
        ("fec0::1", "a private address"),
        ("169.254.169.254", "a link-local address"),  # metadata
        ("fe80::1%eth0", "a link-local address"),
        ("224.0.0.1", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("240.0.0.1", "a reserved address"),
        ("255.255.255.255", "a reserved address"),
        ("168.63.129.16", "an address of the cloud's platform"),  # Azure's
        ("::ffff:127.0.0.1", "a loopback address"),
        ("::ffff:169.254.169.254", "a link-local address"),
        ("::ffff:a9fe:a9fe", "a link-local address"),
        ("::127.0.0.1", "a loopback address"),
        ("64:ff9b::10.0.0.1", "a private address"),
        ("64:ff9b::169.254.169.254", "a link-local address"),
        ("2002:7f00:1::1", "a loopback address"),
        ("2002:c0a8:101::1", "a private address"),
        ("8.8.8.8", None),
        ("93.184.216.34", None),
        ("172.32.0.1", None),
        ("2606:2800:220:1:248:1893:25c8:1946", None),
        ("::ffff:8.8.8.8", None),
        ("64:ff9b::8.8.8.8", None),
        ("2002:808:808::1", None),
    ],
)
def test_only_public_addresses_are_public(address, kind):
    assert private_kind(address) == kind


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0x7f.1",
        "127.1",
        "127.0.0.1.",
        "[::1]",
        "localhost",
        "LOCALHOST.",
        "photos.localhost",
        "metadata.google.internal",
        "printer.local",
        "0xa9fea9fe",
        "2852039166",
    ],
)
def test_a_private_host_is_known_by_any_spelling(host):
    assert private_host(host) is not None


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "localhost.example.com", "internal.example", "134744072"]
)
def test_a_public_host_or_a_name_is_not_refused_by_its_spelling(host):
    assert private_host(host) is None

// Package dhcp speaks DHCPv4 for others: as the client of each container (RFC
// 2131) and as the relay agent of all of them (RFC 1542, 3046, 3527, 8357) at once.
// It sends each BOOTREQUEST from giaddr:67 to the servers' port 67 and reads
// the answers on giaddr:67, so that port 68 stays free for the host. Or, where
// nobody knows a server, it is the client alone, and broadcasts on an interface
// by a packet socket.
//
// [Client] runs the exchanges of one lease, a link carries the messages of one
// relay address or interface, message.go and reply.go are the bytes.
//
// # Deviations from the RFCs
//
//   - RFC 2131 section 4.1, retransmission after 4, 8, 16, … s: ours comes
//     after 1, 2, 4, 4, … s, each shortened by up to half at random. A person
//     waits for the container: with 30 s to spend and 30 % of the packets lost
//     each way, the RFC's times succeed in 82 % of all cases, these in 99.8 %
//     (simulated). A lease that is only confirmed takes one round trip and gets
//     a second of the container's start: 0.3, 0.6, 1.2, … s.
//   - RFC 2131 section 3.1 (3), the REQUEST is broadcast: a relay agent's goes to
//     the chosen server alone, because an authoritative dnsmasq refuses one that
//     names another server, and its NAK comes first. The offers of the others lapse.
//   - RFC 2131 section 3.2, the REQUEST of INIT-REBOOT is broadcast: ours goes to
//     the leasing server alone, because an authoritative dnsmasq refuses what
//     another server has leased. On a LAN that is a broadcast to IP, in an Ethernet
//     frame for one station.
//   - RFC 2131 section 4.4.1, a random wait of 1 to 10 s before the first
//     DISCOVER: left out, since containers don't start together by a power
//     failure's hand but wait for us one by one.
//   - RFC 2131 section 4.4.4, a RELEASE is unicast: on a LAN it is broadcast, since
//     it has no answer by which a station that doesn't hear would be noticed. It
//     names its server, and the others ignore it.
//   - RFC 2131 section 4.4.5, a renewal is unicast by the client itself: ours is
//     relayed (ciaddr and giaddr set), because the answer must reach the host
//     and not the container, which has no DHCP client. On a LAN it is a broadcast to
//     IP in a frame for one station, since that may be a relay agent, and it is
//     asked again in the form of INIT-REBOOT, see below.
//   - RFC 2131 section 3.1 (5), the client checks an acknowledged address by
//     ARP: only where the network's conflict_check asks for it, since servers
//     ping first, and the host may have no interface on that network. An address
//     that another of our containers holds is declined in any case.
//   - RFC 2131 section 4.4.5, the address isn't used after the lease's end: an
//     engine can't take it from a running container. The same one is asked for
//     anew; on_lease_lost=stop has the container stopped.
//   - RFC 2131 section 4.4.5, no retries under 60 s: states shorter than that
//     have a bound of one second, see lease.Lease.Retry.
//   - RFC 4361 section 6.1, client identifiers made of a DUID: ours are 01 + MAC,
//     by which administrators of these networks write reservations and read
//     tables, or 00 and a readable name, by which a container that is created
//     anew is the same client.
//   - RFC 2131 section 4.4.1 (table 5), no options in RELEASE and DECLINE but
//     those that it names: option 118 is in them where it was in the lease's other
//     messages, because a dnsmasq ignores a RELEASE without it.
//   - RFC 3011, an OFFER or ACK without option 118 is dropped: ours is taken, since
//     an address of another subnet is refused anyway.
//   - RFC 3046 section 2.1, adding option 82 is disabled by default: link selection
//     is not, since without it no server would serve a subnet that doesn't contain
//     giaddr. link_selection=off leaves it out. Who an endpoint is, is told only
//     where the network's option82 asks for it, each sub-option by itself.
//   - RFC 4702 section 3.1, option 12 isn't sent beside option 81: it is where
//     host_name=on, because an ISC dhcpd without DNS updates keeps nothing of option
//     81.
//
// Server identifier override (RFC 5107) is not for us. It has clients send their
// renewals to the relay agent instead of the server; ours are relayed anyway, as
// nobody but us sends them. And with our address in option 54, the servers could no
// longer be told apart.
//
// # What servers make of INIT-REBOOT
//
// Measured with ISC dhcpd 4.4.3-P1, Kea 2.2.0 and dnsmasq 2.90, each
// authoritative; TestRealConfirm and TestRealConfirmOfOthers hold it.
//
//   - The client's own address is acknowledged to the same client identifier
//     with another MAC, and the lease table then has the new MAC.
//   - An address of an unknown subnet, of another subnet than the link's or of
//     another client is refused.
//   - A free address of the range is granted by ISC and dnsmasq, even to a client
//     that was never heard of, and refused by Kea. The client's own address after
//     its RELEASE is such a one.
//   - To an address of the right subnet outside of the range ISC says nothing.
//
// Kea 2.2.0 drops every message whose client identifier is longer than 128
// bytes, without a word in its log at level INFO. ISC and dnsmasq take all 255.
//
// # What servers make of relay agents' options
//
// Measured with the same servers; TestRealLinkSelection, TestRealAgent,
// TestRealChosenByAgent, TestRealRelayPort, TestRealNames and
// TestRealLargestMessage hold it.
//
//   - All honour link selection (RFC 3527) and option 118 (RFC 3011), and return
//     the latter. With neither they serve giaddr's subnet: ISC and dnsmasq refuse the
//     renewal of another's address, Kea says nothing.
//   - All return option 82, Kea in the order of the sub-options' codes, and can
//     choose by circuit id whom they serve: a renewal without it is then refused by
//     ISC and Kea, and ignored by dnsmasq. ISC keeps it with the lease
//     (stash-agent-options), and so does Kea (store-extended-info); dnsmasq doesn't.
//   - Kea answers to the source port of a relay agent that tells it (RFC 8357). ISC
//     and dnsmasq answer to port 67 all the same: to them another port is of no use.
//   - Of option 81, Kea keeps the whole name, dnsmasq its first label, ISC nothing
//     unless it updates DNS.
//   - All understand the longest message that there is, of 1,067 bytes with a
//     client identifier of 128.
//
// # Beside others on UDP port 67
//
// A socket on giaddr:67 with SO_REUSEADDR lives beside programs that have bound
// other addresses of the host, or set it too. Beside one that has bound all
// addresses or ours without it, as a dnsmasq without bind-interfaces does, the port
// can't be bound, and a raw IP socket gets a copy of what comes to the address
// instead. The other program gets the answers as well; dnsmasq takes no notice of
// them (a relay agent that has bound so might pass them on: not tried). If the
// daemon is started first, it is the other one's bind that fails. Once the other
// one has gone, the kernel answers servers that the port is unreachable (ICMP),
// which they take no notice of, until the daemon is restarted.
//
// # What servers make of renewals by broadcast
//
// Measured with the same servers, the client's interface being a macvlan's parent
// or the bridge whose port the container is; TestRealBroadcastForms,
// TestRealBroadcast and TestRealBroadcastOwnHost hold it. Without giaddr, the
// answer goes to ciaddr where that is set (RFC 2131 section 4.1), and the host must
// see it pass. To whom each server sends it, as Ethernet and IP have it:
//
//	                             ISC dhcpd  Kea, raw sockets     dnsmasq
//	with ciaddr (RENEWING,       all, all   asker's, container   container, container
//	REBINDING)
//	with option 50               all, all   asker's, all         all, all
//	(INIT-REBOOT)
//
// Each form prolongs the lease, in a frame for the server alone or for all, from
// 0.0.0.0 or from ciaddr. Behind ISC's dhcrelay, which relays those frames too, all
// answers are broadcast.
//
//   - What goes to a container's own MAC is seen on the parent of a macvlan, and not
//     on a bridge. Two seconds after the first form the second is therefore sent. It
//     never comes first: a server that has lost its leases makes them anew at a
//     renewal, while Kea refuses an INIT-REBOOT that it knows nothing of.
//   - A container has no DHCP client: its kernel answers what comes for it by ICMP,
//     port unreachable. So does that of the host, with redirect and host
//     unreachable, where Kea sends it what is for the container and it forwards, as
//     Docker has it do. With ether_source=container Kea sends that to the container.
//   - ISC and Kea on the host itself are heard on the interface that they serve, a
//     dnsmasq isn't: frames that leave are seen by packet sockets only.
package dhcp

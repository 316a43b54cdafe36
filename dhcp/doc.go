// Package dhcp speaks DHCPv4 for others: as the client of each container (RFC
// 2131) and as the relay agent of all of them (RFC 1542, 3046, 3527) at once.
// It sends each BOOTREQUEST from giaddr:67 to the servers' port 67 and reads
// the answers on giaddr:67, so that port 68 stays free for the host.
//
// [Client] runs the exchanges of one lease, a link carries the messages of one
// relay address, message.go and reply.go are the bytes.
//
// # Deviations from the RFCs
//
//   - RFC 2131 section 4.1, retransmission after 4, 8, 16, … s: ours comes
//     after 1, 2, 4, 4, … s, each shortened by up to half at random. A person
//     waits for the container: with 30 s to spend and 30 % of the packets lost
//     each way, the RFC's times succeed in 82 % of all cases, these in 99.8 %
//     (simulated). A lease that is only confirmed takes one round trip and gets
//     a second of the container's start: 0.3, 0.6, 1.2, … s.
//   - RFC 2131 section 3.1 (3), the REQUEST is broadcast: ours goes to the chosen
//     server alone, because an authoritative dnsmasq refuses one that names
//     another server, and its NAK comes first. The offers of the others lapse.
//   - RFC 2131 section 3.2, the REQUEST of INIT-REBOOT is broadcast: ours goes to
//     the leasing server alone, because an authoritative dnsmasq refuses what
//     another server has leased.
//   - RFC 2131 section 4.4.1, a random wait of 1 to 10 s before the first
//     DISCOVER: left out, since containers don't start together by a power
//     failure's hand but wait for us one by one.
//   - RFC 2131 section 4.4.5, a renewal is unicast by the client itself: ours is
//     relayed (ciaddr and giaddr set), because the answer must reach the host
//     and not the container, which has no DHCP client.
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
//   - RFC 3046 section 2.1, a relay adds option 82 and the server returns it:
//     ours is sent only where link selection is needed, and not required back.
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
package dhcp

// Package lease says what a DHCP lease is and keeps leases alive.
//
// A lease is a value; its state is a function of time ([Lease.State]); so is
// the moment of its next renewal ([Lease.Retry]). Everything else is a way in
// or a way out: the [Manager] owns the pools and leases of this host, asks a
// [Client] for the protocol and a [Store] for memory over restarts, and knows
// neither packets nor files nor HTTP.
package lease

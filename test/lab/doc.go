// Package lab builds small networks of real things on one machine: network
// namespaces on one LAN, real DHCP servers, private Docker engines, whole
// machines that systemd boots, and the daemon that all of this is there to try.
//
// Everything is in namespaces and in one scratch folder, and Lab.Close takes
// it all down again. Nothing outlives its owner either: processes carry a
// parent-death signal, an engine with all its containers lives in a PID
// namespace whose first process carries one, as a machine does, and what a
// killed run leaves behind (namespaces, folders) the next one sweeps up.
//
// Tests begin with ForTest. Programs begin with Check, New and CloseOnSignal.
package lab

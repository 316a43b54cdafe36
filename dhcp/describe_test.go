package dhcp

import (
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Each kind of value as people read it; what isn't of its kind stands in bytes.
func TestDescribeValues(t *testing.T) {
	text := func(code byte, s string) []byte { return appendOptions(nil, option{code, []byte(s)}) }
	for _, c := range []struct {
		raw  []byte
		want lease.ReceivedOption
	}{
		{appendOptions(nil, opt(53, ack)), lease.ReceivedOption{Code: 53, Name: "dhcp message type", Value: "ack"}},
		{appendOptions(nil, opt(53, 77)), lease.ReceivedOption{Code: 53, Name: "dhcp message type", Value: "4d"}},
		{appendOptions(nil, opt(53)), lease.ReceivedOption{Code: 53, Name: "dhcp message type", Value: ""}},
		{appendOptions(nil, addrOpt(1, "255.255.255.0")), lease.ReceivedOption{Code: 1, Name: "subnet mask", Value: "255.255.255.0"}},
		{appendOptions(nil, opt(1, 255, 255, 0)), lease.ReceivedOption{Code: 1, Name: "subnet mask", Value: "ff:ff:00"}},
		{appendOptions(nil, opt(1, make([]byte, 16)...)), lease.ReceivedOption{Code: 1, Name: "subnet mask", Value: strings.Repeat(":00", 16)[1:]}},
		{appendOptions(nil, opt(3, 10, 10, 0, 1, 10, 10, 0, 2)), lease.ReceivedOption{Code: 3, Name: "router", Value: "10.10.0.1, 10.10.0.2"}},
		{appendOptions(nil, opt(6, 10, 10, 0, 1, 9)), lease.ReceivedOption{Code: 6, Name: "domain name server", Value: "0a:0a:00:01:09"}},
		{appendOptions(nil, opt(6)), lease.ReceivedOption{Code: 6, Name: "domain name server", Value: ""}},
		{appendOptions(nil, timeOpt(51, 5400)), lease.ReceivedOption{Code: 51, Name: "ip address lease time", Value: "1h30m0s"}},
		{appendOptions(nil, timeOpt(51, 1<<32-1)), lease.ReceivedOption{Code: 51, Name: "ip address lease time", Value: "infinite"}},
		{appendOptions(nil, opt(58, 0, 1)), lease.ReceivedOption{Code: 58, Name: "renewal (t1) time value", Value: "00:01"}},
		{appendOptions(nil, timeOpt(2, 1<<32-3600)), lease.ReceivedOption{Code: 2, Name: "time offset", Value: "-1h0m0s"}},
		{appendOptions(nil, opt(2, 1)), lease.ReceivedOption{Code: 2, Name: "time offset", Value: "01"}},
		{appendOptions(nil, opt(26, 0x05, 0xdc)), lease.ReceivedOption{Code: 26, Name: "interface mtu", Value: "1500"}},
		{appendOptions(nil, opt(23, 64)), lease.ReceivedOption{Code: 23, Name: "default ip time-to-live", Value: "64"}},
		{appendOptions(nil, opt(26, 1, 2, 3)), lease.ReceivedOption{Code: 26, Name: "interface mtu", Value: "01:02:03"}},
		{appendOptions(nil, opt(25, 0, 68, 5, 220)), lease.ReceivedOption{Code: 25, Name: "path mtu plateau table", Value: "68, 1500"}},
		{appendOptions(nil, opt(55, 1, 3, 121)), lease.ReceivedOption{Code: 55, Name: "parameter request list", Value: "1, 3, 121"}},
		{appendOptions(nil, opt(19, 1)), lease.ReceivedOption{Code: 19, Name: "ip forwarding", Value: "on"}},
		{appendOptions(nil, opt(19, 0)), lease.ReceivedOption{Code: 19, Name: "ip forwarding", Value: "off"}},
		{appendOptions(nil, opt(19, 2)), lease.ReceivedOption{Code: 19, Name: "ip forwarding", Value: "02"}},
		{appendOptions(nil, opt(33, 10, 1, 1, 1, 10, 0, 0, 1)), lease.ReceivedOption{Code: 33, Name: "static route", Value: "10.1.1.1 via 10.0.0.1"}},
		{appendOptions(nil, opt(21, 10, 1, 1, 0, 255, 255, 255, 0)), lease.ReceivedOption{Code: 21, Name: "policy filter", Value: "10.1.1.0/255.255.255.0"}},
		{text(15, "example.org\x00"), lease.ReceivedOption{Code: 15, Name: "domain name", Value: "example.org"}},
		{text(12, "wéb"), lease.ReceivedOption{Code: 12, Name: "host name", Value: "wéb"}},
		{text(56, "a\x1b[2J\n\"\\\xff\u202eb"), lease.ReceivedOption{Code: 56, Name: "message", Value: `a\x1b[2J\n\"\\\xff\u202eb`}},
		{appendOptions(nil, opt(61, 1, 2, 0x42, 0xff)), lease.ReceivedOption{Code: 61, Name: "client-identifier", Value: "01:02:42:ff"}},
		{text(43, "ab"), lease.ReceivedOption{Code: 43, Name: "vendor specific information", Value: "61:62"}},
		{text(224, "ab"), lease.ReceivedOption{Code: 224, Value: "61:62"}},
		// RFC 3442's own examples, and the default route.
		{
			appendOptions(nil, opt(121, 0, 1, 1, 1, 1, 8, 10, 1, 1, 1, 2, 25, 10, 229, 0, 128, 1, 1, 1, 3, 32, 10, 198, 122, 47, 1, 1, 1, 4)),
			lease.ReceivedOption{Code: 121, Name: "classless static route", Value: "0.0.0.0/0 via 1.1.1.1, 10.0.0.0/8 via 1.1.1.2, 10.229.0.128/25 via 1.1.1.3, 10.198.122.47/32 via 1.1.1.4"},
		},
		{appendOptions(nil, opt(121, 33, 10, 1, 1, 1, 1, 1, 1, 1, 2)), lease.ReceivedOption{Code: 121, Name: "classless static route", Value: "21:0a:01:01:01:01:01:01:01:02"}},
		{appendOptions(nil, opt(121, 8, 10, 1, 1, 1)), lease.ReceivedOption{Code: 121, Name: "classless static route", Value: "08:0a:01:01:01"}},
		// RFC 3397 section 2's example.
		{
			text(119, "\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04"),
			lease.ReceivedOption{Code: 119, Name: "domain search", Value: "eng.apple.com, marketing.apple.com"},
		},
		{text(119, "\x05a.b\n\"\x00"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: `a\.b\n\"`}},
		{text(119, "\xc0\x00"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "c0:00"}},
		{text(119, "\x01a\xc0\x00"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "01:61:c0:00"}},
		{text(119, "\x01a\x00\x01b\xc0\x09\x01c\xc0\x03"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "01:61:00:01:62:c0:09:01:63:c0:03"}},
		{text(119, "\x01a"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "01:61"}},
		{text(119, "\x05a"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "05:61"}},
		{text(119, "\x01a\xc0"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "01:61:c0"}},
		{text(119, "\x41a\x00"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "41:61:00"}},
		{text(119, "\x00"), lease.ReceivedOption{Code: 119, Name: "domain search", Value: "00"}},
	} {
		if got := Describe(c.raw); len(got) != 1 || got[0] != c.want {
			t.Errorf("% x is %+v, want %+v", c.raw, got, c.want)
		}
	}
}

// Their order is kept, parts are joined, pads and ends are none, and what is cut
// ends the list.
func TestDescribeAll(t *testing.T) {
	raw := slices.Concat(
		appendOptions(nil, opt(53, ack), addrOpt(54, "10.10.0.1"), option{15, []byte("exam")}),
		[]byte{0}, appendOptions(nil, timeOpt(51, 60), option{15, []byte("ple")}), []byte{12, 9, 'x'})
	want := []lease.ReceivedOption{
		{Code: 53, Name: "dhcp message type", Value: "ack"},
		{Code: 54, Name: "server identifier", Value: "10.10.0.1"},
		{Code: 15, Name: "domain name", Value: "example"},
		{Code: 51, Name: "ip address lease time", Value: "1m0s"},
	}
	for _, cut := range [][]byte{nil, {12}, {255, 12, 1, 'x'}} {
		if got := Describe(append(raw[:len(raw)-3:len(raw)-3], cut...)); !slices.Equal(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if got := Describe(raw); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := Describe(nil); got == nil || len(got) != 0 {
		t.Errorf("%#v of nothing", got)
	}
}

// The names are in lower case, and each stands once.
func TestDescribeNames(t *testing.T) {
	seen := map[string]int{}
	for code, known := range knownOptions {
		if known.name != strings.ToLower(known.name) || known.name == "" && known.read != nil {
			t.Errorf("option %d is %q", code, known.name)
		}
		if other, again := seen[known.name]; again && known.name != "" {
			t.Errorf("options %d and %d are both %q", other, code, known.name)
		}
		seen[known.name] = code
	}
}

// wellDescribed is what holds for the description of any bytes.
func wellDescribed(t *testing.T, raw []byte) {
	t.Helper()
	options := Describe(raw)
	if len(options) > 254 {
		t.Errorf("%d options", len(options))
	}
	for _, o := range options {
		if len(o.Value) > maxValue+len("…") || !utf8.ValidString(o.Value) || strings.ContainsFunc(o.Value, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("option %d is %q", o.Code, o.Value)
		}
	}
}

// However long a value is made, its text has an end, and so has the work: names
// of pointers expand a hundredfold.
func TestDescribeIsBounded(t *testing.T) {
	for code := range 256 {
		for _, part := range []string{"\x00", "\x01", "a", "\n", "é", "\xc0\x00", "\x3f" + strings.Repeat("x", 63)} {
			value := strings.Repeat(part, 1<<16/len(part))
			var raw []byte
			for chunk := range slices.Chunk([]byte(value), 255) {
				raw = appendOptions(raw, option{byte(code), chunk})
			}
			wellDescribed(t, raw)
		}
	}
	name := strings.Repeat("\x3f"+strings.Repeat("x", 63), 3) + "\x00"
	var raw []byte
	for chunk := range slices.Chunk([]byte(name+strings.Repeat("\xc0\x00", 30_000)), 255) {
		raw = appendOptions(raw, option{119, chunk})
	}
	wellDescribed(t, raw)
	if got := Describe(raw)[0].Value; !strings.HasPrefix(got, "xxx") || !strings.HasSuffix(got, "…") || len(got) != maxValue+len("…") {
		t.Errorf("%d bytes: %.20s", len(got), got)
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add(appendOptions(nil, opt(53, ack), addrOpt(54, "10.10.0.1"), timeOpt(51, 3600), option{15, []byte("example.org")}))
	f.Add(appendOptions(nil, option{119, []byte("\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04")}, opt(121, 8, 10, 1, 1, 1, 2)))
	f.Add([]byte{119, 4, 1, 'a', 0xc0, 0, 121, 1, 33})
	f.Fuzz(func(t *testing.T, raw []byte) { wellDescribed(t, raw) })
}

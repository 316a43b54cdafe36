package dhcp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// maxValue bounds the text of one option's value in bytes. What was cut off
// shows as "…".
const maxValue = 1024

// Describe reads options as lease.Lease has them, in their order. Those that
// came in parts are joined (RFC 3396). They come from strangers: a value that
// isn't what its RFC says is shown as bytes, and no text has control characters
// or more than 1027 bytes.
func Describe(raw []byte) []lease.ReceivedOption {
	var codes []byte
	values := map[byte][]byte{}
	for len(raw) > 0 {
		code := raw[0]
		if dhcp4.OptionCode(code) == dhcp4.Pad {
			raw = raw[1:]
			continue
		}
		if dhcp4.OptionCode(code) == dhcp4.End || len(raw) < 2 || len(raw) < 2+int(raw[1]) {
			break
		}
		end := 2 + int(raw[1])
		if _, again := values[code]; !again {
			codes = append(codes, code)
		}
		values[code] = append(values[code], raw[2:end]...)
		raw = raw[end:]
	}
	options := make([]lease.ReceivedOption, 0, len(codes))
	for _, code := range codes {
		known, value := knownOptions[code], values[code]
		text, ok := "", false
		if known.read != nil {
			text, ok = known.read(value)
		}
		if !ok {
			text = readBytes(value)
		}
		options = append(options, lease.ReceivedOption{Code: code, Name: known.name, Value: shorten(text)})
	}
	return options
}

// shorten cuts a text at maxValue.
func shorten(text string) string {
	if len(text) <= maxValue {
		return text
	}
	// Half a character may remain.
	return strings.ToValidUTF8(text[:maxValue], "") + "…"
}

// format reads a value, or says that it is none of its kind.
type format func(value []byte) (text string, ok bool)

// knownOptions have the names of RFC 2132, and the later ones their own RFC's.
var knownOptions = [256]struct {
	name string
	read format
}{
	1:   {"subnet mask", readAddr},
	2:   {"time offset", readOffset},
	3:   {"router", readAddrs},
	4:   {"time server", readAddrs},
	5:   {"name server", readAddrs},
	6:   {"domain name server", readAddrs},
	7:   {"log server", readAddrs},
	8:   {"cookie server", readAddrs},
	9:   {"lpr server", readAddrs},
	10:  {"impress server", readAddrs},
	11:  {"resource location server", readAddrs},
	12:  {"host name", readText},
	13:  {"boot file size", readNumber},
	14:  {"merit dump file", readText},
	15:  {"domain name", readText},
	16:  {"swap server", readAddr},
	17:  {"root path", readText},
	18:  {"extensions path", readText},
	19:  {"ip forwarding", readSwitch},
	20:  {"non-local source routing", readSwitch},
	21:  {"policy filter", readPairs("/")},
	22:  {"maximum datagram reassembly size", readNumber},
	23:  {"default ip time-to-live", readNumber},
	24:  {"path mtu aging timeout", readSeconds},
	25:  {"path mtu plateau table", readNumbers},
	26:  {"interface mtu", readNumber},
	27:  {"all subnets are local", readSwitch},
	28:  {"broadcast address", readAddr},
	29:  {"perform mask discovery", readSwitch},
	30:  {"mask supplier", readSwitch},
	31:  {"perform router discovery", readSwitch},
	32:  {"router solicitation address", readAddr},
	33:  {"static route", readPairs(" via ")},
	34:  {"trailer encapsulation", readSwitch},
	35:  {"arp cache timeout", readSeconds},
	36:  {"ethernet encapsulation", readSwitch},
	37:  {"tcp default ttl", readNumber},
	38:  {"tcp keepalive interval", readSeconds},
	39:  {"tcp keepalive garbage", readSwitch},
	40:  {"network information service domain", readText},
	41:  {"network information servers", readAddrs},
	42:  {"network time protocol servers", readAddrs},
	43:  {"vendor specific information", nil},
	44:  {"netbios over tcp/ip name server", readAddrs},
	45:  {"netbios over tcp/ip datagram distribution server", readAddrs},
	46:  {"netbios over tcp/ip node type", readNumber},
	47:  {"netbios over tcp/ip scope", nil},
	48:  {"x window system font server", readAddrs},
	49:  {"x window system display manager", readAddrs},
	50:  {"requested ip address", readAddr},
	51:  {"ip address lease time", readSeconds},
	52:  {"option overload", readNumber},
	53:  {"dhcp message type", readType},
	54:  {"server identifier", readAddr},
	55:  {"parameter request list", readCodes},
	56:  {"message", readText},
	57:  {"maximum dhcp message size", readNumber},
	58:  {"renewal (t1) time value", readSeconds},
	59:  {"rebinding (t2) time value", readSeconds},
	60:  {"vendor class identifier", readText},
	61:  {"client-identifier", nil},
	64:  {"network information service+ domain", readText},
	65:  {"network information service+ servers", readAddrs},
	66:  {"tftp server name", readText},
	67:  {"bootfile name", readText},
	68:  {"mobile ip home agent", readAddrs},
	69:  {"simple mail transport protocol server", readAddrs},
	70:  {"post office protocol server", readAddrs},
	71:  {"network news transport protocol server", readAddrs},
	72:  {"default world wide web server", readAddrs},
	73:  {"default finger server", readAddrs},
	74:  {"default internet relay chat server", readAddrs},
	75:  {"streettalk server", readAddrs},
	76:  {"streettalk directory assistance server", readAddrs},
	77:  {"user class", nil},                                     // RFC 3004
	80:  {"rapid commit", nil},                                   // RFC 4039
	81:  {"client fqdn", nil},                                    // RFC 4702
	82:  {"relay agent information", nil},                        // RFC 3046
	91:  {"client last transaction time", readSeconds},           // RFC 4388
	92:  {"associated ip", readAddrs},                            // RFC 4388
	100: {"posix timezone", readText},                            // RFC 4833
	101: {"tzdb timezone", readText},                             // RFC 4833
	108: {"ipv6-only preferred", readSeconds},                    // RFC 8925
	114: {"captive portal", readText},                            // RFC 8910
	116: {"auto-configure", readSwitch},                          // RFC 2563
	118: {"subnet selection", readAddr},                          // RFC 3011
	119: {"domain search", readNames},                            // RFC 3397
	120: {"sip servers", nil},                                    // RFC 3361
	121: {"classless static route", readRoutes},                  // RFC 3442
	125: {"vendor-identifying vendor-specific information", nil}, // RFC 3925
	150: {"tftp server address", readAddrs},                      // RFC 5859
	249: {"classless static route (microsoft)", readRoutes},
	252: {"web proxy auto-discovery", readText},
}

// readBytes shows what nothing is known of.
func readBytes(value []byte) string {
	// One more than fits, for shorten to see it.
	return strings.ReplaceAll(fmt.Sprintf("% x", value[:min(len(value), maxValue/3+1)]), " ", ":")
}

func readAddr(value []byte) (string, bool) {
	addr, _ := netip.AddrFromSlice(value)
	return addr.String(), len(value) == 4
}

// readEach reads a list of values of one length, of at least one.
func readEach(value []byte, size int, read func([]byte) string) (string, bool) {
	var texts []string
	for part := range slices.Chunk(value, size) {
		if len(part) < size {
			return "", false
		}
		texts = append(texts, read(part))
	}
	return strings.Join(texts, ", "), len(value) > 0
}

func addrOf(value []byte) string { return netip.AddrFrom4([4]byte(value)).String() }

func readAddrs(value []byte) (string, bool) { return readEach(value, 4, addrOf) }

// readPairs reads a list of pairs of addresses.
func readPairs(between string) format {
	return func(value []byte) (string, bool) {
		return readEach(value, 8, func(pair []byte) string { return addrOf(pair[:4]) + between + addrOf(pair[4:]) })
	}
}

func readNumbers(value []byte) (string, bool) {
	return readEach(value, 2, func(n []byte) string { return strconv.Itoa(int(binary.BigEndian.Uint16(n))) })
}

func readCodes(value []byte) (string, bool) {
	return readEach(value, 1, func(n []byte) string { return strconv.Itoa(int(n[0])) })
}

func readNumber(value []byte) (string, bool) {
	switch len(value) {
	case 1:
		return strconv.Itoa(int(value[0])), true
	case 2:
		return strconv.Itoa(int(binary.BigEndian.Uint16(value))), true
	}
	return "", false
}

func readSwitch(value []byte) (string, bool) {
	if len(value) != 1 || value[0] > 1 {
		return "", false
	}
	return []string{"off", "on"}[value[0]], true
}

func readSeconds(value []byte) (string, bool) {
	if len(value) != 4 {
		return "", false
	}
	length := time.Duration(binary.BigEndian.Uint32(value)) * time.Second
	if length == lease.LeaseForEver {
		return "infinite", true
	}
	return length.String(), true
}

// readOffset reads seconds to the east of UTC.
func readOffset(value []byte) (string, bool) {
	if len(value) != 4 {
		return "", false
	}
	return (time.Duration(int32(binary.BigEndian.Uint32(value))) * time.Second).String(), true
}

func readType(value []byte) (string, bool) {
	if len(value) != 1 {
		return "", false
	}
	name, ok := messageTypes[dhcp4.MessageType(value[0])]
	return name, ok
}

// readText reads text, which must not end with zeros but may (RFC 2132 section
// 2). What can't be printed is written as in Go, and so are a quote and a
// backslash: no text looks like another's.
func readText(value []byte) (string, bool) {
	value = value[:min(len(value), maxValue+1)]
	quoted := strconv.Quote(strings.TrimRight(string(value), "\x00"))
	return quoted[1 : len(quoted)-1], true
}

// readRoutes reads a list of prefixes, of which only the significant bytes are
// there, and routers.
func readRoutes(value []byte) (string, bool) {
	var routes []string
	for len(value) > 0 {
		bits := int(value[0])
		size := 1 + (bits+7)/8
		if bits > 32 || len(value) < size+4 {
			return "", false
		}
		var to [4]byte
		copy(to[:], value[1:size])
		routes = append(routes, netip.PrefixFrom(netip.AddrFrom4(to), bits).String()+" via "+addrOf(value[size:size+4]))
		value = value[size+4:]
	}
	return strings.Join(routes, ", "), len(routes) > 0
}

// readNames reads a list of DNS names, whose ends may be pointers to what
// stands before them (RFC 1035 section 4.1.4).
func readNames(value []byte) (string, bool) {
	var names []string
	size := 0
	for at := 0; at < len(value) && size <= maxValue; {
		name, next, ok := readName(value, at)
		if !ok {
			return "", false
		}
		names = append(names, name)
		size += len(name)
		at = next
	}
	return strings.Join(names, ", "), len(names) > 0
}

// readName reads the name at a place, and where the next one begins.
func readName(value []byte, at int) (name string, next int, ok bool) {
	const (
		pointer = 0xc0
		longest = 255 // with the lengths of its labels (RFC 1035 section 2.3.4)
	)
	var labels []string
	size := 0
	// Each pointer must point before the part that it ends, so that there is no
	// loop.
	for begin := at; at < len(value); {
		length := int(value[at])
		switch {
		case length&pointer == pointer && at+1 < len(value):
			if next == 0 {
				next = at + 2
			}
			at = (length&^pointer)<<8 | int(value[at+1])
			if at >= begin {
				return "", 0, false
			}
			begin = at
		case length&pointer != 0:
			return "", 0, false
		case length == 0:
			return strings.Join(labels, "."), max(next, at+1), size > 0
		default:
			end := at + 1 + length
			if size += 1 + length; end > len(value) || size >= longest {
				return "", 0, false
			}
			label, _ := readText(value[at+1 : end])
			labels = append(labels, strings.ReplaceAll(label, ".", `\.`))
			at = end
		}
	}
	return "", 0, false
}

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// captureCommand writes the daemon's packets to a file.
func captureCommand(file *conf.File, stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name: "capture", Usage: "write the daemon's DHCP packets as pcapng, which Wireshark opens; exit status 1: there were none",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "container", Usage: "only those of this container, by its `NAME` or MAC address"},
			&cli.StringFlag{Name: "pool", Usage: "only those of this pool, by its `ID` or subnet"},
			&cli.DurationFlag{Name: "for", Value: 30 * time.Second, Usage: "`TIME` to wait for packets; Ctrl-C ends it earlier"},
			&cli.IntFlag{Name: "last", Usage: "begin with the last `N` packets that the daemon remembers; without --for that is all"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "new `FILE` to write, - for standard output (default: oam-docker-ipam-DATE-TIME.pcapng here, or standard output where that is no terminal)"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := file.Err(); err != nil {
				return err
			}
			return capture(ctx, cmd, stdout, stderr)
		},
	}
}

// capture writes what the daemon streams, until the time is over, the user has
// enough, or the daemon stops.
func capture(ctx context.Context, cmd *cli.Command, stdout, stderr io.Writer) error {
	what := server.Capture{Container: cmd.String("container"), Pool: cmd.String("pool"), Last: cmd.Int("last")}
	length := cmd.Duration("for")
	switch {
	case what.Last < 0:
		return fmt.Errorf("capture: --last %d: want a number of packets", what.Last)
	case length <= 0:
		return fmt.Errorf("capture: --for %s: want a time to wait for packets, such as 30s; --last N alone waits for none", length)
	case what.Last > 0 && !cmd.IsSet("for"):
		length = 0
	}
	began := time.Now()
	in, err := server.OpenCapture(ctx, socket(cmd), what, length)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := captureTo(cmd.String("output"), began, stdout)
	if err != nil {
		return err
	}
	if length > 0 {
		fmt.Fprintf(stderr, "capturing for %s: Ctrl-C ends it\n", length)
	}
	got, ended, err := copyPackets(out, in)
	if err := errors.Join(err, out.done(got.packets > 0)); err != nil {
		return fmt.Errorf("write packets to %s: %w", out.name, err)
	}
	if got.lost > 0 {
		fmt.Fprintf(stderr, "%d packets came faster than they were read and are lost\n", got.lost)
	}
	complete := ended == io.EOF && time.Since(began) >= length
	switch {
	case errors.Is(ended, errNoBlock):
		return fmt.Errorf("read the daemon's packets: %w: %d packets in %s", ended, got.packets, out.name)
	case ctx.Err() == nil && !complete:
		return fmt.Errorf("the daemon stopped in the middle of it, after %s (journalctl -u oam-docker-ipam says why): %d packets in %s", time.Since(began).Round(time.Millisecond), got.packets, out.name)
	case got.packets == 0:
		return errors.New(noPackets(what, length))
	}
	fmt.Fprintf(stderr, "%d packets in %s\n", got.packets, out.name)
	return nil
}

// noPackets says what to look at when there were none.
func noPackets(what server.Capture, length time.Duration) string {
	of := ""
	if what.Container != "" {
		of += " of container " + what.Container
	}
	if what.Pool != "" {
		of += " of pool " + what.Pool
	}
	if length == 0 {
		return fmt.Sprintf("no packet%s is remembered: the daemon keeps the last 1000 since its start; --for 30s waits for the next, and oam-docker-ipam events tells what was before", of)
	}
	return fmt.Sprintf("no packet%s in this time: a container's are sent when it starts, and at half of its lease (see oam-docker-ipam leases); --last 100 shows what was before, and oam-docker-ipam doctor what is wrong", of)
}

// captured is where packets go.
type captured struct {
	io.Writer
	name string   // for people
	file *os.File // nil where it isn't ours
}

// captureTo opens where packets go: what was typed, or what suits.
func captureTo(typed string, now time.Time, stdout io.Writer) (captured, error) {
	if _, toPeople := terminal(stdout); typed == "-" || typed == "" && !toPeople {
		return captured{stdout, "standard output", nil}, nil
	}
	if typed == "" {
		typed = now.Format("oam-docker-ipam-20060102-150405.pcapng")
	}
	file, err := os.OpenFile(typed, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%w: name a new one; -o - writes to whatever standard output is", err)
	}
	return captured{file, typed, file}, err
}

// done closes the file, if there is one of ours, and keeps it if it holds
// something.
func (c captured) done(holds bool) error {
	if c.file == nil {
		return nil
	}
	err := c.file.Close()
	if err == nil && !holds {
		err = os.Remove(c.name)
	}
	return err
}

// tally is what a capture holds.
type tally struct {
	packets int
	lost    uint64
}

// Blocks of pcapng, as the daemon writes them on this host: a type and a length
// of 32 bits, least significant byte first, what is in it, and the length again.
const (
	blockHeader     = 8
	maxBlock        = 1 << 20 // a packet has 64 KiB at most
	statisticsBlock = 5
	packetBlock     = 6
	// dropped is where our statistics have how many packets are lost so far.
	dropped = 24
)

// errNoBlock: what follows isn't pcapng.
var errNoBlock = errors.New("there is no block of pcapng")

// copyPackets copies whole blocks only, so that what has been written can be
// opened wherever it ends. It returns why there are no more: io.EOF at the end
// that the daemon meant, and err where they couldn't be written.
func copyPackets(w io.Writer, r io.Reader) (got tally, ended, err error) {
	in := bufio.NewReader(r)
	block := make([]byte, blockHeader)
	for {
		block = block[:blockHeader]
		if _, err := io.ReadFull(in, block); err != nil {
			return got, err, nil
		}
		kind, length := binary.LittleEndian.Uint32(block), binary.LittleEndian.Uint32(block[4:])
		if length < blockHeader || length > maxBlock {
			return got, fmt.Errorf("%w of %d bytes", errNoBlock, length), nil
		}
		block = slices.Grow(block, int(length)-blockHeader)[:length]
		if _, err := io.ReadFull(in, block[blockHeader:]); err != nil {
			return got, io.ErrUnexpectedEOF, nil
		}
		if _, err := w.Write(block); err != nil {
			return got, nil, err
		}
		switch {
		case kind == packetBlock:
			got.packets++
		case kind == statisticsBlock && length >= dropped+8:
			got.lost = binary.LittleEndian.Uint64(block[dropped:])
		}
	}
}

package lab

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path"
)

// Applets of busybox that the image has by name.
var applets = []string{
	"arping", "cat", "date", "echo", "false", "grep", "hostname", "ip", "ls", "nc", "ping",
	"ps", "route", "sh", "sleep", "true", "udhcpc", "wget",
}

// ImportImage makes an image out of the system's static busybox: there may be
// no registry to pull one from. Its containers sleep, and end at once when
// they are told to.
func (e *Engine) ImportImage(name string) error {
	return importImage(e.DockerCommand, name)
}

func importImage(docker func(Command) (string, error), name string) error {
	rootfs, err := busyboxRootfs()
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	// A first process that sets no handler doesn't get SIGTERM at all, and
	// `docker stop` then takes ten seconds.
	const command = `CMD ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"]`
	_, err = docker(Command{
		Args:  []string{"import", "--change", command, "-", name},
		Stdin: bytes.NewReader(rootfs),
	})
	return err
}

// busyboxRootfs returns a file system as a tar.
func busyboxRootfs() ([]byte, error) {
	file, err := lookTool("busybox")
	if err != nil {
		return nil, err
	}
	if err := isStatic(file); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	var errs []error
	add := func(header tar.Header, content []byte) {
		header.Size = int64(len(content))
		errs = append(errs, w.WriteHeader(&header))
		_, err := w.Write(content)
		errs = append(errs, err)
	}
	for _, dir := range []string{"bin/", "etc/", "tmp/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, program)
	for _, applet := range applets {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: path.Join("bin", applet), Linkname: "busybox", Mode: 0o777}, nil)
	}
	errs = append(errs, w.Close())
	return archive.Bytes(), errors.Join(errs...)
}

// isStatic refuses a program that needs a dynamic linker: the image has none.
func isStatic(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	defer f.Close()
	for _, segment := range f.Progs {
		if segment.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is not static (Debian has busybox-static)", file)
		}
	}
	return nil
}
